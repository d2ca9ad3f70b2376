"""Plans of training runs from a recipe and its data, with a forecast. Needs no torch."""
