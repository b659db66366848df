"""Models that see: few-shot adaptation of CLIP, adapters by modality, retrieval of pages."""
