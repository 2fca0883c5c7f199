"""What several backends read: prepared launches, the layout of rows, distance buckets, Fourier factors, tables on a device."""
