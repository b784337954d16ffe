"""What two or more stages share of learning: fine-tuning, many tasks, features, probes."""
