"""The operator: definition and checks (`functional`), registration (`library`), code (`reference`, `cpu`)."""
