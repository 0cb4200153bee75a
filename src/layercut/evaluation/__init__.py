"""What is measured of a model: perplexity, accuracy, agreement, speed."""
