"""A device's part in a fleet that learns together, by Flower: adapters go to and fro, local data never do."""
