"""The trainer, its arguments, checkpoints, callbacks and optimizer."""
