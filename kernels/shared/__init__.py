"""Code that several backends use: prepared launches, row layouts, distance buckets, Fourier factors, tables on a device."""
