"""scripts/new.py: looks at a folder of pictures, a base and a card, decides, and writes a recipe with its reasons. Nothing is trained."""
