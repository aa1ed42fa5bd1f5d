// The checks of the C++ tests: the first that fails ends the program with its place and values.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "transport/error.h"

namespace check {

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
    std::_Exit(1);  // also from a thread, without waiting for the others
}

template <class Left, class Right>
void equal(const char* file, int line, const char* text, const Left& left, const Right& right) {
    if (left == right) return;
    std::ostringstream out;
    out << text << ": " << left << " is not " << right;
    fail(file, line, out.str());
}

// `call` must raise a Failure of this kind and rank whose text has `word`.
template <class Call>
void raises(const char* file, int line, pipekern::Fault kind, int rank, const std::string& word, const Call& call) {
    try {
        call();
    } catch (const pipekern::Failure& failure) {
        if (failure.kind() == kind && failure.rank() == rank &&
            std::string(failure.what()).find(word) != std::string::npos)
            return;
        fail(file, line,
             "raised kind " + std::to_string(static_cast<int>(failure.kind())) + ", rank " +
                 std::to_string(failure.rank()) + ": " + failure.what());
    }
    fail(file, line, "raised nothing; expected '" + word + "'");
}

}  // namespace check

#define CHECK(condition) ((condition) ? void() : check::fail(__FILE__, __LINE__, #condition))
#define CHECK_EQUAL(left, right) check::equal(__FILE__, __LINE__, #left " == " #right, left, right)
#define CHECK_RAISES(kind, rank, word, ...) \
    check::raises(__FILE__, __LINE__, kind, rank, word, [&] { static_cast<void>(__VA_ARGS__); })
