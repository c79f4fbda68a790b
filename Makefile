# Each target finds or makes the python that it needs, then runs (scripts/run.sh). Arguments: make test ARGS="-k plan -x"
.PHONY: demo test kernel-tests check bench train-demo

demo test check bench train-demo:
	@scripts/run.sh $@ $(ARGS)

# The kernels' tests that need no GPU, with another Triton if asked: make kernel-tests TRITON=3.9.0
kernel-tests:
	@scripts/run.sh $@ $(if $(TRITON),--triton $(TRITON)) $(ARGS)
