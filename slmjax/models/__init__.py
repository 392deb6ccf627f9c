"""Decoders and encoders, assembled from values; what they cost; `families/` has the published ones."""
