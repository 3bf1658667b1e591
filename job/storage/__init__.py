"""Places that outlive the process: stores of whole files, and the commit of a run to them. No TensorFlow."""
