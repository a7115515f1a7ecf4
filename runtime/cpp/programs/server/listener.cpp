#include "listener.hpp"

#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

namespace http {
namespace {

constexpr double LINGER = 2;  // seconds in which a client that was refused may still send
constexpr std::size_t PART = 64 << 10;

int signal_pipe = -1;  // a signal handler may only write

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void set_nonblocking(int descriptor) {
    fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) | O_NONBLOCK);
    fcntl(descriptor, F_SETFD, FD_CLOEXEC);
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

int listen_on(const std::string& address, int port) {
    addrinfo hints = {}, *all = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
    if (const int error = getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &all))
        throw std::runtime_error(address + ": " + gai_strerror(error));
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owned(all, freeaddrinfo);
    const int made = socket(all->ai_family, all->ai_socktype, all->ai_protocol);
    if (made < 0) fail(address);
    const int yes = 1;
    setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(made, all->ai_addr, all->ai_addrlen) || listen(made, 256)) {
        const int error = errno;
        ::close(made);
        errno = error;
        fail(address + ":" + std::to_string(port));
    }
    set_nonblocking(made);
    return made;
}

int port_of(int socket) {
    sockaddr_storage address = {};
    socklen_t size = sizeof address;
    char service[16] = "0";
    if (!getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size))
        getnameinfo(reinterpret_cast<sockaddr*>(&address), size, nullptr, 0, service, sizeof service, NI_NUMERICSERV);
    return std::stoi(service);
}

}  // namespace

Listener::Listener(Host& host, const std::string& address, int port, Limits limits) : host_(host), limits_(limits) {
    socket_ = listen_on(address, port);
    port_ = port_of(socket_);
    if (pipe(wake_)) fail("pipe");
    set_nonblocking(wake_[0]), set_nonblocking(wake_[1]);
    signal_pipe = wake_[1];
}

Listener::~Listener() {
    signal_pipe = -1;
    for (const auto& entry : connections_) ::close(entry.second.socket);
    for (const int descriptor : {socket_, wake_[0], wake_[1]})
        if (descriptor >= 0) ::close(descriptor);
}

void Listener::pass_on(int signal) {
    struct sigaction action = {};
    action.sa_handler = [](int number) {
        const int error = errno;
        const char byte = static_cast<char>(number);
        if (::write(signal_pipe, &byte, 1) < 0) errno = error;
        errno = error;
    };
    sigaction(signal, &action, nullptr);
}

void Listener::run() {
    while (!stopping_ || host_.goes_on(!connections_.empty())) {
        std::vector<pollfd> polled = {{wake_[0], POLLIN, 0}};
        std::vector<std::uint64_t> ids;
        if (!stopping_) polled.push_back({socket_, POLLIN, 0});
        const std::size_t first = polled.size();
        double until = std::numeric_limits<double>::infinity();
        for (const auto& [id, connection] : connections_) {
            const bool reads = connection.state == State::READING || connection.state == State::CLOSING;
            const short events = reads ? POLLIN : connection.state == State::WRITING ? POLLOUT : POLLRDHUP;
            polled.push_back({connection.socket, events, 0});
            ids.push_back(id);
            until = std::min(until, connection.until);
        }
        const double left = std::clamp(std::ceil(1e3 * (until - now())), 0.0, stopping_ ? 100.0 : 60e3);
        if (poll(polled.data(), polled.size(), static_cast<int>(left)) < 0 && errno != EINTR) fail("poll");
        if (polled[0].revents) run_posted();
        for (std::size_t index = 0; index < ids.size(); ++index) {
            const auto connection = connections_.find(ids[index]);
            if (connection == connections_.end()) continue;
            if (const short events = polled[first + index].revents) serve(ids[index], connection->second, events);
            const auto still = connections_.find(ids[index]);
            if (still != connections_.end() && now() >= still->second.until) close(ids[index]);
        }
        if (!stopping_ && polled[1].revents) accept();
    }
}

void Listener::stop() {
    if (stopping_) return;
    stopping_ = true;
    ::close(socket_);
    socket_ = -1;
    for (auto& [id, connection] : connections_)
        if (connection.state == State::READING) connection.until = connection.in.empty() ? 0 : now() + 1;
}

void Listener::answer(std::uint64_t id, const Response& response) {
    const auto connection = connections_.find(id);
    if (connection == connections_.end() || connection->second.state != State::WAITING) return;
    reply(connection->second, response, connection->second.keep_alive && !stopping_);
}

void Listener::post(std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    posted_.push_back(std::move(work));
    const char byte = 0;
    if (posted_.size() == 1 && ::write(wake_[1], &byte, 1) < 0) return;  // a full pipe wakes as well
}

void Listener::run_posted() {
    char bytes[256];
    for (ssize_t size; (size = read(wake_[0], bytes, sizeof bytes)) > 0;)
        for (ssize_t index = 0; index < size; ++index)
            if (bytes[index]) host_.signalled(bytes[index]);
    std::vector<std::function<void()>> posted;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        posted.swap(posted_);
    }
    for (const auto& work : posted) work();
}

void Listener::accept() {
    for (int client; (client = ::accept(socket_, nullptr, nullptr)) >= 0;) {
        set_nonblocking(client);
        if (connections_.size() >= limits_.connections && !evict()) {
            ::close(client);
            continue;
        }
        Connection& connection = connections_[++last_];
        connection.socket = client;
        connection.until = now() + limits_.silence;
    }
}

// Makes room: closes the connection that has been silent for the longest time. False where all have requests under way.
bool Listener::evict() {
    auto oldest = connections_.end();
    for (auto entry = connections_.begin(); entry != connections_.end(); ++entry)
        if (entry->second.state == State::READING || entry->second.state == State::CLOSING)
            if (oldest == connections_.end() || entry->second.until < oldest->second.until) oldest = entry;
    if (oldest == connections_.end()) return false;
    close(oldest->first);
    return true;
}

void Listener::serve(std::uint64_t id, Connection& connection, short events) {
    bool alive = true;
    switch (connection.state) {
        case State::READING:
            alive = receive(id, connection);
            break;
        case State::WAITING:  // the client has left, or its last bytes are there
            alive = !(events & (POLLRDHUP | POLLHUP | POLLERR));
            break;
        case State::WRITING:
            alive = !(events & POLLERR) && send(connection) && parse(id, connection);
            break;
        case State::CLOSING: {
            char bytes[4096];
            const ssize_t size = recv(connection.socket, bytes, sizeof bytes, 0);
            alive = size > 0 || (size < 0 && errno == EAGAIN);
            break;
        }
    }
    if (!alive) close(id);
}

// Reads what is there; false where the client has left.
bool Listener::receive(std::uint64_t id, Connection& connection) {
    char bytes[PART];
    const ssize_t size = recv(connection.socket, bytes, sizeof bytes, 0);
    if (size < 0) return errno == EAGAIN || errno == EINTR;
    if (size == 0) return false;
    if (connection.in.empty()) connection.until = now() + limits_.silence;
    connection.in.append(bytes, static_cast<std::size_t>(size));
    return parse(id, connection);
}

// Answers or passes on the request at the beginning of what was read, where it is whole.
bool Listener::parse(std::uint64_t id, Connection& connection) {
    if (connection.state != State::READING || connection.in.empty()) return true;
    if (!connection.head.bytes) {
        connection.head = read_head(connection.in);
        const Head& head = connection.head;
        connection.keep_alive = head.request.keep_alive;
        if (!head.bytes && !head.refusal) return true;
        std::optional<Response> refused = host_.refuse(head, id);
        if (refused) {
            reply(connection, *refused, false);
            return true;
        }
    }
    const Head& head = connection.head;
    if (connection.in.size() < head.bytes + head.length) {
        if (!connection.continued && head.request.header("expect") == "100-continue") {
            const std::string go_on = "HTTP/1.1 100 Continue\r\n\r\n";
            if (::send(connection.socket, go_on.data(), go_on.size(), MSG_NOSIGNAL) < 0) return false;
            connection.continued = true;
        }
        return true;
    }
    Request request = connection.head.request;
    std::string rest = connection.in.substr(head.bytes + head.length);
    connection.in.resize(head.bytes + head.length);
    request.body = std::move(connection.in.erase(0, head.bytes));
    connection.in = std::move(rest);
    connection.state = State::WAITING;
    connection.until = std::numeric_limits<double>::infinity();
    host_.ask(std::move(request), id);
    return true;
}

void Listener::reply(Connection& connection, const Response& response, bool keep_alive) {
    connection.keep_alive = keep_alive;
    connection.out = write(response, keep_alive, connection.head.request.method != "HEAD");
    connection.sent = 0;
    connection.state = State::WRITING;
    connection.until = now() + limits_.unread;  // the next turn sends it
}

// Writes what the client takes; false where it has left.
bool Listener::send(Connection& connection) {
    if (connection.state != State::WRITING) return true;
    while (connection.sent < connection.out.size()) {
        const ssize_t size = ::send(connection.socket, connection.out.data() + connection.sent,
                                    connection.out.size() - connection.sent, MSG_NOSIGNAL);
        if (size < 0) return errno == EAGAIN || errno == EINTR;
        connection.sent += static_cast<std::size_t>(size);
    }
    connection.out.clear();
    connection.head = {};
    connection.continued = false;
    if (connection.keep_alive && !stopping_) {
        connection.state = State::READING;
        connection.until = now() + limits_.idle;
    } else {  // what it still sends must not turn the answer into a reset
        shutdown(connection.socket, SHUT_WR);
        connection.state = State::CLOSING;
        connection.until = now() + LINGER;
    }
    return true;
}

void Listener::close(std::uint64_t id) {
    const auto connection = connections_.find(id);
    ::close(connection->second.socket);
    connections_.erase(connection);
    host_.leave(id);
}

}  // namespace http
