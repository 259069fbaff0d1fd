// The emulator's scheduler: see emulator.cuh.
#include "emulator.cuh"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ipt_fast::cuda::emulator {
namespace {

constexpr size_t kStack = 128 << 10;

struct Copy {
    void* to;
    const void* from;
    bool there;
    bool last;  // of its group
};

struct Thread {
    unsigned char* stack;
    ucontext_t start;
    jmp_buf resume;
    bool begun, done;
    const unsigned* barrier;  // the thread waits while *barrier == seen
    unsigned seen;
    std::vector<Copy> copies;
};

struct Warp {
    Exchange lanes[kWarp];
    int arrived;
    unsigned generation;
};

struct EmulatedBlock {
    int64_t index;
    int threads;
    std::vector<Thread> all;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    int arrived;
    unsigned generation;
    int current;
    jmp_buf scheduler;
    void (*body)(const void*, const void*);
    const void* kernel;
    const void* arguments;
    std::string error;
};

thread_local EmulatedBlock* block;
bool reversed;

unsigned char* aligned(std::vector<unsigned char>& bytes) {
    return (unsigned char*)(((uintptr_t)bytes.data() + 127) & ~(uintptr_t)127);
}

void wait_for(const unsigned& barrier) {
    Thread& self = block->all[block->current];
    self.barrier = &barrier;
    self.seen = barrier;
    if (_setjmp(self.resume) == 0) {
        _longjmp(block->scheduler, 1);
    }
}

void begin() {
    block->body(block->kernel, block->arguments);
    Thread& self = block->all[block->current];
    if (!self.copies.empty()) {
        fail("a thread ended with asynchronous copies that it did not wait for");
    }
    self.done = true;
    _longjmp(block->scheduler, 1);
}

bool runnable(const Thread& thread) {
    return !thread.done && (thread.barrier == nullptr || *thread.barrier != thread.seen);
}

// Until the thread waits or ends.
void resume(int index) {
    Thread& thread = block->all[index];
    block->current = index;
    thread.barrier = nullptr;
    if (_setjmp(block->scheduler) == 0) {
        if (thread.begun) {
            _longjmp(thread.resume, 1);
        }
        thread.begun = true;
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack;
        thread.start.uc_stack.ss_size = kStack;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, begin, 0);
        setcontext(&thread.start);
    }
}

void run_block() {
    for (Thread& thread : block->all) {
        thread.begun = thread.done = false;
        thread.barrier = nullptr;
        thread.copies.clear();
    }
    for (Warp& warp : block->warps) {
        warp.arrived = 0;
    }
    block->arrived = 0;
    std::fill(block->shared.begin(), block->shared.end(), 0xff);
    for (;;) {
        bool moved = false, left = false;
        for (size_t w = 0; w < block->warps.size(); ++w) {
            const int warp = (int)(reversed ? block->warps.size() - 1 - w : w);
            for (bool again = true; again;) {
                again = false;
                for (int l = 0; l < kWarp; ++l) {
                    const int index = warp * kWarp + (reversed ? kWarp - 1 - l : l);
                    if (runnable(block->all[index])) {
                        resume(index);
                        moved = again = true;
                        if (!block->error.empty()) {
                            return;
                        }
                    }
                }
            }
        }
        for (const Thread& thread : block->all) {
            left = left || !thread.done;
        }
        if (!left) {
            return;
        }
        if (!moved) {
            block->error = "threads wait for others that have ended or wait elsewhere";
            return;
        }
    }
}

}  // namespace

int thread_index() { return block->current; }
int64_t block_index() { return block->index; }
int block_threads() { return block->threads; }
unsigned char* shared_memory() { return aligned(block->shared); }
void set_reversed(bool value) { reversed = value; }

void fail(const char* message) {
    block->error = message;
    _longjmp(block->scheduler, 1);
}

void sync_block() {
    if (++block->arrived == block->threads) {
        block->arrived = 0;
        ++block->generation;
        return;
    }
    wait_for(block->generation);
}

void collective(const Exchange& mine, void (*all)(const Exchange (&lanes)[kWarp])) {
    Warp& warp = block->warps[block->current / kWarp];
    warp.lanes[block->current % kWarp] = mine;
    if (++warp.arrived < kWarp) {
        wait_for(warp.generation);
        return;
    }
    for (const Exchange& lane : warp.lanes) {
        if (lane.operation != mine.operation) {
            fail("lanes of a warp call different collectives");
        }
    }
    warp.arrived = 0;
    ++warp.generation;
    all(warp.lanes);
}

void check_shared(const void* address, int bytes) {
    const auto* p = static_cast<const unsigned char*>(address);
    const unsigned char* first = aligned(block->shared);
    if (p < first || p + bytes > block->shared.data() + block->shared.size()) {
        fail("an address outside of the shared memory");
    }
    check_aligned(address, bytes);
}

void check_aligned(const void* address, int bytes) {
    if ((uintptr_t)address % bytes != 0) {
        fail("an address that is not aligned");
    }
}

void copy_async(void* to, const void* from, bool there) {
    check_shared(to, 16);
    check_aligned(there ? from : nullptr, 16);
    block->all[block->current].copies.push_back({to, from, there, false});
}

void copy_commit() {
    auto& copies = block->all[block->current].copies;
    // An empty group counts, too.
    copies.push_back({nullptr, nullptr, false, true});
}

void copy_wait(int pending) {
    auto& copies = block->all[block->current].copies;
    int groups = 0;
    for (const Copy& copy : copies) {
        groups += copy.last;
    }
    size_t done = 0;
    for (; groups > pending; ++done) {
        const Copy& copy = copies[done];
        groups -= copy.last;
        if (copy.to != nullptr) {
            copy.there ? (void)memcpy(copy.to, copy.from, 16) : (void)memset(copy.to, 0, 16);
        }
    }
    copies.erase(copies.begin(), copies.begin() + (ptrdiff_t)done);
}

void shuffle_all(const Exchange (&lanes)[kWarp]) {
    for (const Exchange& lane : lanes) {
        const int from = static_cast<const Shuffle*>(lane.in)->from;
        *static_cast<float*>(lane.out) = static_cast<const Shuffle*>(lanes[from % kWarp].in)->value;
    }
}

namespace {
void load(const Exchange (&lanes)[kWarp], bool transposed) {
    for (const Exchange& lane : lanes) {
        check_shared(lane.in, 16);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint32_t word = 0;
            for (int half = 0; half < 2; ++half) {
                const int i = lane / 4, j = lane % 4 * 2 + half, row = transposed ? j : i, column = transposed ? i : j;
                uint32_t value = static_cast<const uint16_t*>(lanes[matrix * 8 + row].in)[column];
                word |= value << 16 * half;
            }
            static_cast<uint32_t*>(lanes[lane].out)[matrix] = word;
        }
    }
}
}  // namespace

void load_matrices_all(const Exchange (&lanes)[kWarp]) { load(lanes, false); }
void load_matrices_transposed_all(const Exchange (&lanes)[kWarp]) { load(lanes, true); }

int multiprocessors() { return getenv("IPT_FAST_EMULATED_RECORD") == nullptr ? 1 : 132; }

bool recorded(const void* kernel, const void* arguments, size_t arguments_bytes, int64_t blocks, int threads,
              int shared_bytes) {
    const char* path = getenv("IPT_FAST_EMULATED_RECORD");
    if (path == nullptr) {
        return false;
    }
    Dl_info library;
    FILE* file = fopen(path, "a");
    if (file == nullptr || dladdr((const void*)&recorded, &library) == 0) {
        throw std::runtime_error(std::string("ipt_fast: no launch can be recorded in ") + path);
    }
    const size_t place = (size_t)((uintptr_t)kernel - (uintptr_t)library.dli_fbase);
    fprintf(file, "%zx %lld %d %d ", place, (long long)blocks, threads, shared_bytes);
    for (size_t i = 0; i < arguments_bytes; ++i) {
        fprintf(file, "%02x", static_cast<const unsigned char*>(arguments)[i]);
    }
    fprintf(file, "\n");
    fclose(file);
    return true;
}

void run(void (*body)(const void*, const void*), const void* kernel, const void* arguments, int64_t blocks, int threads,
         int shared_bytes) {
    if (threads % kWarp != 0 || threads > 1024 || shared_bytes > 227 << 10) {
        throw std::runtime_error("ipt_fast: no GPU takes such a launch");
    }
    EmulatedBlock state = {};
    state.threads = threads;
    state.all.resize((size_t)threads);
    static thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (stacks.size() < state.all.size()) {
        stacks.push_back(std::make_unique_for_overwrite<unsigned char[]>(kStack));
    }
    for (size_t i = 0; i < state.all.size(); ++i) {
        state.all[i].stack = stacks[i].get();
    }
    state.warps.resize((size_t)threads / kWarp);
    state.shared.resize((size_t)shared_bytes + 127);
    state.body = body;
    state.kernel = kernel;
    state.arguments = arguments;
    block = &state;
    for (int64_t i = 0; i < blocks && state.error.empty(); ++i) {
        state.index = reversed ? blocks - 1 - i : i;
        run_block();
    }
    block = nullptr;
    if (!state.error.empty()) {
        throw std::runtime_error("ipt_fast, emulated: " + state.error);
    }
}

}  // namespace ipt_fast::cuda::emulator
