"""Images in: where they come from, how they become model inputs, and what their labels are (`fewbit.data.images`)."""
