#include "transport/error.h"

#include <cerrno>
#include <system_error>

namespace pipekern {

void throw_errno(const std::string& tried, const std::string& mend) {
    const std::string reason = std::system_category().message(errno);
    throw Failure(Fault::kTransport, -1, tried + ": " + reason + (mend.empty() ? "" : "; " + mend));
}

}  // namespace pipekern
