"""Weight files in and out: readers and writers of the published containers, and the doors built on them."""
