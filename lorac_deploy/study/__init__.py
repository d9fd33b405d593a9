"""Studies: every method with every drift, number of samples, share of wrong labels and seed, side by side."""
