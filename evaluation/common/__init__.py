"""What the evaluations share. Rows, intervals and the scoring loop are the package's: `hippoformer.evaluation`."""
