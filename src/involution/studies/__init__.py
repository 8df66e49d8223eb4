"""Studies: claims put to the test by many trainings, each described by a YAML file beside this one."""
