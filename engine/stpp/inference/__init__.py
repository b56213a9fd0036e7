"""Networks made ready to predict: compiled predictors, their gate, views, evaluation."""
