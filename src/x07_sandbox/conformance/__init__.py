"""The list of behaviours that every backend must have, and the code that checks them."""
