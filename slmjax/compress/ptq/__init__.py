"""Post-training quantization: weights rounded after training, with or without calibration data."""
