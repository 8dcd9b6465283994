"""The implementations of the row operators, and the choice between them."""
