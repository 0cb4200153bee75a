"""All that takes optimiser steps in a trainer: healing, fine-tuning, early steps."""
