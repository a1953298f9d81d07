"""The bilinear sampler, written once per backend: arrays in, arrays out."""
