"""Decoders and encoders, assembled from values, and their FLOPs; `families/` has published architectures."""
