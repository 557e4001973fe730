"""What the benchmarks share: command line, session, checkpoint, training, scores, pictures."""
