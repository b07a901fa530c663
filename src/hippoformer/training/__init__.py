"""Layer 4: training. `hippoformer train`, or `Trainer` from Python."""
