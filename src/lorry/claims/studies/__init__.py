"""One file for each method or topic whose claims are tried."""
