"""How do other libraries' modules run on pyfused? One file a library: the forwards that fuse_ gives to their instances."""
