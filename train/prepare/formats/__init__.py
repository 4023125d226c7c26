"""What a metadata file holds: JSON streams, CSV, columns, printed cells. What the values mean for a post is told in posts/."""
