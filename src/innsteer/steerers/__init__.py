"""One file per method; the file name is the method name, and the shelf is the list."""
