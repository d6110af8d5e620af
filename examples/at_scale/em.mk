# RA3's iterations as separate jobs: E-phase, annotation by many workers, M-phase, and again. Each stage is an ordinary
# command whose output is the next one's input; make does no stage again that is finished, and a killed one goes on.
#
#   make -f examples/at_scale/em.mk BASE=Qwen/Qwen2.5-Coder-0.5B CORPUS=corpus.jsonl RUN=runs/em ITERATIONS=3
#   make -f examples/at_scale/em.mk -n ...      # says what it would do
#
# On a cluster LAUNCH and ANNOTATE are what starts a job and waits for it, such as `srun --gpus 8 accelerate launch`.
BASE ?= Qwen/Qwen2.5-Coder-0.5B
CORPUS ?= corpus.jsonl
RUN ?= runs/em
ITERATIONS ?= 2
E_STEPS ?= 200
PYTHON ?= python
LAUNCH ?= $(PYTHON)
ANNOTATE ?= $(LAUNCH)
# Options of all stages, and of one kind.
COMMON ?=
E_ARGS ?=
A_ARGS ?=
M_ARGS ?=

.PHONY: all
.DELETE_ON_ERROR:
all: $(RUN)/m-$(ITERATIONS)/done

# The checkpoint that an iteration begins with.
start = $(if $(filter 1,$(1)),$(BASE),$(RUN)/m-$(shell expr $(1) - 1))
# A killed training goes on from its last checkpoint.
go_on = $(if $(wildcard $(1)/checkpoint-*),--resume_from_checkpoint true)

define iteration
$(RUN)/e-$(1)/done: $(if $(filter 1,$(1)),,$(call start,$(1))/done)
	$(LAUNCH) -m ra3_trl.cli.train --model_name_or_path $(call start,$(1)) --dataset_name $(CORPUS) \
	  --e_steps $(E_STEPS) --m_steps 0 --seed $(1) --output_dir $(RUN)/e-$(1) $$(call go_on,$(RUN)/e-$(1)) $(COMMON) $(E_ARGS)
	touch $$@

$(RUN)/data-$(1)/done: $(RUN)/e-$(1)/done
	$(ANNOTATE) -m ra3_trl.cli.annotate $(RUN)/e-$(1) --dataset_name $(CORPUS) --tokens --seed $(1) \
	  --output_dir $(RUN)/data-$(1) $(A_ARGS)
	touch $$@

$(RUN)/m-$(1)/done: $(RUN)/data-$(1)/done
	$(LAUNCH) -m ra3_trl.cli.train --model_name_or_path $(RUN)/e-$(1) --dataset_name $(RUN)/data-$(1) \
	  --e_steps 0 --seed $(1) --output_dir $(RUN)/m-$(1) $$(call go_on,$(RUN)/m-$(1)) $(COMMON) $(M_ARGS)
	touch $$@
endef

$(foreach i,$(shell seq $(ITERATIONS)),$(eval $(call iteration,$(i))))
