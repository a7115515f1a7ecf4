// A bounded HTTP/1.1 server over poll(): one thread, no connection waits for another.
//
// cpp-httplib would give a thread to each connection, so that as many silent clients as it has threads stop it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "http.hpp"

namespace http {

struct Limits {
    std::size_t connections =
        500;              // at a time; a further one takes the place of the one that is silent for the longest time
    double silence = 20;  // seconds for the head and body of a request
    double idle = 10;     // seconds between two requests
    double unread = 30;   // seconds for which an answer may wait for its reader
};

// What answers requests; called in the listener's thread.
class Host {
  public:
    virtual ~Host() = default;
    // An answer to a head, before its body is read; none where it may come.
    virtual std::optional<Response> refuse(const Head& head, std::uint64_t id) = 0;
    // A request; Listener::answer ends it, now or later.
    virtual void ask(Request request, std::uint64_t id) = 0;
    // A connection has ended: where its request has no answer yet, nobody waits for it.
    virtual void leave(std::uint64_t id) = 0;
    // A signal that the listener was asked to pass on.
    virtual void signalled(int number) = 0;
    // Whether to go on serving; asked from `stop` on, ten times a second.
    virtual bool goes_on(bool has_connections) = 0;
};

class Listener {
  public:
    // Listens; port 0 takes any that is free. Throws std::runtime_error.
    Listener(Host& host, const std::string& address, int port, Limits limits);
    ~Listener();
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;

    int port() const { return port_; }
    void pass_on(int signal);  // to Host::signalled, in the listener's thread

    // Serves until `stop`, and then while the host goes on.
    void run();
    void stop();                                              // takes no more connections
    void answer(std::uint64_t id, const Response& response);  // nothing where the client has left
    void post(std::function<void()> work);  // runs it in the listener's thread; any thread may call this

  private:
    enum class State { READING, WAITING, WRITING, CLOSING };

    struct Connection {
        int socket;
        State state = State::READING;
        std::string in, out;
        std::size_t sent = 0;
        double until = 0;  // when it is closed unless its state changes
        Head head;         // of the request under way
        bool keep_alive = true, continued = false;
    };

    void accept();
    bool evict();
    void serve(std::uint64_t id, Connection& connection, short events);
    bool receive(std::uint64_t id, Connection& connection);
    bool parse(std::uint64_t id, Connection& connection);
    bool send(Connection& connection);
    void reply(Connection& connection, const Response& response, bool keep_alive);
    void close(std::uint64_t id);
    void run_posted();

    Host& host_;
    const Limits limits_;
    int socket_ = -1, port_ = 0, wake_[2] = {-1, -1};
    bool stopping_ = false;
    std::map<std::uint64_t, Connection> connections_;
    std::uint64_t last_ = 0;
    std::mutex mutex_;
    std::vector<std::function<void()>> posted_;
};

}  // namespace http
