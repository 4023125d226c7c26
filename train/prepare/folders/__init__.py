"""Files as they lie on people's disks: walking a source, names, kinds, places. What is in them is read in formats/ and images/."""
