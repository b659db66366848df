"""What a method is: tensors, options, families, and one call of one layer as a method sees it."""
