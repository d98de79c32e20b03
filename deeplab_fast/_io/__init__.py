"""Files and images: atomic writes, decoding, palettes."""
