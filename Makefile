# tbr: `make` builds, `make test` tests, `make bench` measures, `make results`
# compares what the built-in experiment gives with what it gave. For GNU make.
# The programs of the experiment, out/world and out/ablation, are built the
# same way from the files in data/.
#
# Flags that the compiler doesn't know are left out by themselves, so a bare
# C compiler is enough: make CC=clang, make CC=tcc, make CC=arm-...-gcc.
# ARCH= (empty) builds for any machine of this kind instead of for this one.

CC = cc
ARCH = -march=native
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes

# $(call takes,FLAGS) is FLAGS if the compiler and the linker take them, else
# nothing; it tries them together with a second argument.
takes = $(shell echo 'int main(void){return 0;}' > .probe.c; \
  $(CC) -Werror $(1) $(2) .probe.c -o .probe.out >/dev/null 2>&1 && \
  echo '$(1)'; \
  rm -f .probe.c .probe.out)

# Exactness: no contraction of a*b+c, no excess precision (see README).
EXACT := $(call takes,-ffp-contract=off) $(call takes,-fno-math-errno) \
  $(call takes,-fexcess-precision=fast)
FAST := $(call takes,-O3) $(if $(ARCH),$(call takes,$(ARCH)))
OPENMP := $(or $(call takes,-fopenmp,-include omp.h), \
  $(call takes,-fopenmp-simd))
STANDARD := $(call takes,-std=c99)
FLAGS = $(STANDARD) $(FAST) $(EXACT) $(OPENMP) $(CFLAGS)

all: tbr out/world out/ablation

WORLD = data/world/world.c
ABLATION = data/ablation/ablation.c
BUILD = $(CC) $(FLAGS) $< -o $@ -lm $(LDFLAGS)

tbr: tbr.c tbr.h .built
	@[ '$(shell echo GNU)' ] || { echo 'use GNU make (gmake)'; exit 1; }
	$(BUILD)

out/world: $(WORLD) tbr.c tbr.h .built
	@mkdir -p out
	$(BUILD)

out/ablation: $(ABLATION) $(WORLD) tbr.c tbr.h .built
	@mkdir -p out
	$(BUILD)

# How the last build was made; it changes only when another one is wanted.
always:
.built: always
	@echo '$(CC) $(FLAGS) $(LDFLAGS)' | cmp -s - $@ || \
	  echo '$(CC) $(FLAGS) $(LDFLAGS)' > $@

test: all
	@CC='$(CC)' FLAGS='$(FLAGS)' sh test/run.sh

bench: tbr
	@CC='$(CC)' FLAGS='$(FLAGS)' sh test/bench.sh

portability: tbr
	@sh test/portability.sh

results: all
	@sh test/results.sh

lint:
	@for cc in gcc clang; do \
	  command -v $$cc >/dev/null || continue; \
	  for source in tbr.c '-DTBR_DOUBLE tbr.c' $(WORLD) $(ABLATION); do \
	    $$cc -std=c99 $(WARN) -Wno-unknown-pragmas -O2 -c $$source \
	      -o .probe.out || exit 1; \
	  done; done; rm -f .probe.out
	@command -v cppcheck >/dev/null || { echo 'no cppcheck here'; exit 0; }; \
	cppcheck --quiet --std=c99 --enable=warning,performance,portability \
	  --inline-suppr --error-exitcode=1 tbr.c $(ABLATION)

clean:
	rm -rf tbr test/out .built .probe.c .probe.out

.PHONY: all always test bench portability results lint clean
