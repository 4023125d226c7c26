"""From a finished run or a prepared set to a page of the hub: what goes, what its card says, whether its licence may, sending it."""
