"""What is known of an image: labels, masks, tasks, splits; and how labelled images are augmented and kept."""
