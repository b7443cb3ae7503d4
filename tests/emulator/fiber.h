// A coroutine with a stack of its own: Fiber::swap leaves one and goes on in another.
//
// ucontext does this everywhere, with a system call for the signal mask in each swap. A warp swaps 32 times per
// instruction that waits, so x86-64 gets ten instructions instead.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)

namespace emulator {

// noipa: g++ must not reason from the body, which it sees as empty, about which registers survive a call.
__attribute__((naked, noipa)) static void swap_stacks(void** from, void* to) {
    asm("pushq %rbp\n\t"
        "pushq %rbx\n\t"
        "pushq %r12\n\t"
        "pushq %r13\n\t"
        "pushq %r14\n\t"
        "pushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\t"
        "popq %r14\n\t"
        "popq %r13\n\t"
        "popq %r12\n\t"
        "popq %rbx\n\t"
        "popq %rbp\n\t"
        "popq %rcx\n\t"
        "jmp *%rcx");  // ret would be foretold as a return to the fiber that came here, and always wrongly
}

class Fiber {
   public:
    // `entry` never returns: it swaps away for good.
    void start(char* stack, std::size_t bytes, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + bytes);
        *--top = nullptr;  // where a caller's return address would be: entry finds the stack aligned as after a call
        *--top = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        stack_pointer = top;
    }
    static void swap(Fiber& from, Fiber& to) { swap_stacks(&from.stack_pointer, to.stack_pointer); }

   private:
    void* stack_pointer = nullptr;
};

}  // namespace emulator

#else

#include <ucontext.h>

namespace emulator {

class Fiber {
   public:
    void start(char* stack, std::size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void swap(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

   private:
    ucontext_t context;
};

}  // namespace emulator

#endif
