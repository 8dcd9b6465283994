"""What runs anywhere, with no download: every technique on real data, to see and to time it."""
