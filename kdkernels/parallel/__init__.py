"""The loss where ranks share the vocabulary: `kd_loss(..., group=...)`."""
