"""What crosses rooms: errors, batches, role protocols, counter-based randomness, masking, log-probs."""
