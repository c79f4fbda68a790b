# Each target finds or makes the python that it needs, then runs (scripts/run.sh). Arguments: make test ARGS="-k plan -x"
.PHONY: demo test check bench train-demo

demo test check bench train-demo:
	@scripts/run.sh $@ $(ARGS)
