"""Quality, cost and time of a model, alone or against another."""
