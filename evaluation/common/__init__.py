"""What the evaluations share. The scoring loop is the package's: `hippoformer.evaluation`."""
