"""One run: its folder, loop, checkpoints, log and signals; the same for pre-training and transfer."""
