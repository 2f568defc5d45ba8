"""References to compare the fast paths with: slow, literal, and written without a look at what they check."""
