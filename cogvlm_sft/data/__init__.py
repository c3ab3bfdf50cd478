"""From conversations to batches: encoding, the mixture of sources, the collator, the preview."""
