"""Prediction: compiled predictors, their accuracy gate, test-time augmentation, evaluation."""
