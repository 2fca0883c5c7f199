"""How do other libraries' modules run on pyfused? Each library has a file with the forwards that fuse_ installs."""
